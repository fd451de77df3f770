"""What every part of a spec has in common: it is frozen, knows its keys, and says all that is wrong with it at once."""

from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from typing_extensions import Self

from .yaml_reader import Loc

Complaint = tuple[Loc, str]


class Declared(BaseModel):
    """A part of a spec: frozen, closed to unknown keys, and checked by rules of which several may be broken at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _keep_the_rules(self) -> Self:
        complaints = [*self._empty(), *self._broken_rules()]
        if complaints:
            raise ValidationError.from_exception_data(type(self).__name__, [_error(*each) for each in complaints])
        return self

    def _empty(self) -> Iterator[Complaint]:
        for name in sorted(self.model_fields_set - {"value"}):
            if getattr(self, name) is None:
                yield (name,), "is empty; give it a value or leave the key out"

    def _broken_rules(self) -> Iterator[Complaint]:
        """Yield what is wrong with several keys together, each as a path within this part and a sentence."""
        yield from ()

    def _given(self, *names: str) -> list[str]:
        """Return those of the names that the spec gives a value."""
        return [name for name in names if name in self.model_fields_set]


def _error(loc: Loc, message: str) -> InitErrorDetails:
    return InitErrorDetails(type=PydanticCustomError("rule", "{text}", {"text": message}), loc=loc, input=None)
