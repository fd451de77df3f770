"""Small models for tests of the core, and specs for them written on the spot."""

from __future__ import annotations

import math
import textwrap
from pathlib import Path

import torch

import dit_patch
from dit_patch.memo.keys import same_bits


def shift(x, by=1.0):
    """A global that `Toy.forward` calls by name."""
    return x + by


def scaled(x, *, by=1.0):
    """A helper that `cosine` calls, and so a part of its source."""
    return x * by


def cosine(x, by=1.0):
    # A comment.
    return torch.cos(scaled(x, by=by))


def inside(x, first=None):
    """Defines functions; `first` is called before any of them."""
    scale = 2.0

    def twist(x, by):
        return x * by + 1.0

    def spread(x):
        return x - 0.5

    def uses(x):
        return scale * x

    plus, minus = (lambda x: x + 1.0), (lambda x: x - 1.0)
    if first is not None:
        x = first(x)
    return twist(x, scale) + spread(x) + uses(x) + plus(x) + minus(x)


class Table(torch.nn.Module):
    """Reads only the size of its argument; no weights, a buffer and plain attributes."""

    def __init__(self):
        super().__init__()
        self.theta = 2.0
        self.axes = [1, 2]
        self._made = 0
        self.register_buffer("base", torch.arange(64.0), persistent=False)

    def forward(self, x, scale=1.0, device=None):
        """Angles for `x`."""
        self._made += 1
        return self.base[: x.shape[-1]] * self.theta * scale + sum(self.axes)


class Embed(torch.nn.Module):
    """Weights and two children; its result depends on the content of its argument."""

    def __init__(self, size=4):
        super().__init__()
        self.first = torch.nn.Linear(size, size)
        self.last = torch.nn.Linear(size, size)
        self._made = 0

    def forward(self, text):
        self._made += 1
        return self.last(torch.tanh(self.first(text)))


class Sinusoid(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self._made = 0

    def forward(self, t):
        self._made += 1
        return torch.cos(t[:, None].float() * torch.arange(4.0))


class Toy(torch.nn.Module):
    """Something of everything that a spec can name, and a result that each of it changes."""

    def __init__(self):
        super().__init__()
        self.table = Table()
        self.time = Sinusoid()
        self.embed = Embed()
        self.blocks = torch.nn.ModuleList(Embed() for _ in range(2))

    def forward(self, x, t=None, text=None, mask=None, window=1, *, scale=1.0):
        self.seen = self.table(x, scale)
        x = x + self.seen
        if t is not None:
            x = x + self.time(t)
        if text is not None:
            text = self.embed(text)
            bias = torch.ones(text.shape[0]) if mask is None else self.bias_of(mask)
            for block in self.blocks:
                text = block(text) + bias.mean()
            x = x + text.mean(0)
        # As upstream code does: the caller's `window` never gets to where it counts.
        return shift(x) + self.prepare_mask(x.shape[-1], 1)

    def bias_of(self, mask):
        return mask.to(torch.float32).unsqueeze(-1).mul(2.0).squeeze(-1)

    @staticmethod
    def prepare_mask(size, window=1):
        """A mask."""
        return torch.ones(size).cumsum(0).le(window).float()


class Child(Toy):
    """Inherits its forward."""


class Elsewhere(torch.nn.Module):
    """A model that no spec knows."""

    def forward(self, x):
        return x


class Twice(torch.nn.Module):
    """Calls one submodule twice in a forward, with different things made from the same argument."""

    def __init__(self):
        super().__init__()
        self.time = Sinusoid()

    def forward(self, t):
        return self.time(t) + 10 * self.time(t * 2)


class Counting(torch.nn.Module):
    """Makes the numbers of its rows before it enters anything, and asks whether a mask holds anything."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Identity()
        self.last = torch.nn.Identity()
        self.seen = []

    def forward(self, x, rows, mask=None):
        rows = torch.tensor(list(rows))
        order = torch.arange(2, dtype=torch.long)
        self.seen.append((rows, order))
        x = self.first(x)[rows]
        if mask is not None and torch.all(mask[0] == 0):
            x = -x
        return self.last(x)


class Lazy(torch.nn.Module):
    """Leaves what it made in an attribute."""

    def __init__(self):
        super().__init__()
        self.left = None

    def forward(self, x):
        if self.left is None:
            self.left = torch.arange(float(x.shape[-1]))
        return self.left


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lazy = Lazy()

    def forward(self, x):
        return x + self.lazy(x)


def build(cls=Toy):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cls().eval()


def inputs(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, size, generator=generator),
        "t": torch.tensor([3.0, 5.0]),
        "text": torch.randn(3, size, generator=generator),
    }


def write_spec(folder: Path, sites: str, *, model: str = "toys.Toy", name: str = "toy", head: str = "") -> Path:
    """A spec with the given sites (YAML list items) in a directory of its own, which is returned."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f"model: {model}\n{textwrap.dedent(head)}sites:\n{textwrap.indent(textwrap.dedent(sites).strip(), '  ')}\n"
    (folder / f"{name}.yaml").write_text(text)
    return folder


def patch(model, folder: Path, sites: str, *, head: str = "", **options):
    """`apply` with a spec of these sites only."""
    cls = type(model)
    spec = write_spec(folder, sites, model=f"{cls.__module__}.{cls.__qualname__}", head=head)
    return dit_patch.apply(model, specs=[spec], trust=True, **options)


def row(handle, at):
    (found,) = [each for each in handle.stats() if each.at == at]
    return found


def snapshot(model: torch.nn.Module) -> list[tuple[str, dict]]:
    """Every attribute of every module, containers copied one deep, to be compared with `same_snapshot`."""
    return [
        (name, {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()})
        for name, module in model.named_modules()
    ]


def same_snapshot(before, after) -> bool:
    """Same names and the same objects everywhere; hooks and children compared by identity, too."""

    def same(one, other):
        if isinstance(one, dict) and isinstance(other, dict):
            return list(one) == list(other) and all(map(same, one.values(), other.values()))
        return one is other or (isinstance(one, (bool, int, float, str, tuple)) and one == other)

    return [name for name, _ in before] == [name for name, _ in after] and all(
        same(one, other) for (_, one), (_, other) in zip(before, after)
    )


TABLE = "- {at: table.forward, kind: rope, key: {x: [shape]}}"
TIME = "- {at: time.forward, kind: timestep, key: {t: [identity]}}"
EMBED = "- {at: embed.forward, kind: context, key: {text: [identity]}}"
SPAN = "- {at: embed..blocks.0, kind: mask, key: {model.mask: [identity]}}"


def agree(model, plain, *calls):
    """Both give the same bits for each call; calls are made without autograd."""
    with torch.no_grad():
        for call in calls:
            assert same_bits(model(**call), plain(**call))


def counts(handle, at):
    found = row(handle, at)
    return found.hits, found.misses, dict(found.bypassed)


# Replacements for `use:`, in wrapt's four arguments.


def negated(result):
    return -result


rank = [0]


def my_rank():
    return rank[0]


def good_sinusoid(original, instance, args, kwargs):
    (t,) = args
    return torch.cos(t[:, None].float() * torch.arange(4.0))


def sinusoid_off_by_a_bit(original, instance, args, kwargs):
    result = original(*args, **kwargs).clone()
    flat = result.view(-1)
    flat[-1] = torch.nextafter(flat[-1], torch.tensor(math.inf))
    return result


def sinusoid_off_for_one_sample(original, instance, args, kwargs):
    (t,) = args
    return (sinusoid_off_by_a_bit if len(t) == 1 else good_sinusoid)(original, instance, args, kwargs)
