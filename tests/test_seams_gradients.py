"""Gradients: whatever takes part in autograd, the patched model learns what the unpatched one does, over ten steps."""

import copy

import pytest
import torch
import torch.distributed
from seams import case, warm
from test_training import step
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

STEPS = 10


def losses(model, calls, parameters=None, steps=STEPS, target=None, use=None):
    """The loss, and all gradients, of each of some steps of SGD; inference in between."""
    parameters = list(model.parameters()) if parameters is None else parameters
    optimizer = torch.optim.SGD([each for each in parameters if each.requires_grad], lr=0.05)
    found = []
    for number in range(steps):
        call = calls[number % len(calls)]
        optimizer.zero_grad()
        loss = (model if use is None else use)(**call)[0].float().square().mean()
        loss.backward()
        found.append(loss.detach())
        found += [each.grad.clone() for each in parameters if each.grad is not None]
        optimizer.step()
        if number % 3 == 0:
            with torch.no_grad():
                found.append(model(**call)[0].clone())
    return found


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > STEPS
    assert [at for at, (one, other) in enumerate(zip(ours, theirs)) if not torch.equal(one, other)] == []


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone; that of FastVideo's models, if these came before."""
    ours = not torch.distributed.is_initialized()
    if ours:
        path = tmp_path_factory.mktemp("group") / "store"
        torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    if ours:
        torch.distributed.destroy_process_group()


def fsdp1(model, mesh):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)


def fsdp1_original(model, mesh):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)


def fsdp2(model, mesh):
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model, mesh):
    return DistributedDataParallel(model)


WRAPS = {
    "FSDP1": ("diffusers/hunyuan_video", fsdp1),
    "FSDP1 with its own parameters": ("diffusers/wan", fsdp1_original),
    "FSDP2": ("diffusers/wan", fsdp2),
    "DDP": ("diffusers/wan", ddp),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model", "wrap"), [case(f"gradient: {name}", *both) for name, both in WRAPS.items()])
@pytest.mark.parametrize("before", [False, True], ids=["applied after", "applied before"])
def test_training_in_a_wrapper(tiny, group, model, wrap, before):
    each = tiny(model)
    calls = each.calls()
    if before:
        warm(each, calls)
    ours, theirs = (wrap(model, group) for model in each.both)
    if not before:
        each.apply()
        for _ in range(3):
            each.agree(calls, ours, theirs)
    assert_same(local(losses(ours, calls)), local(losses(theirs, calls)))


def local(tensors):
    return [getattr(each, "to_local", lambda each=each: each)() for each in tensors]


def functional(model):
    """Weights handed over for one call: a hypernetwork's, say."""
    weights = {name: each.detach().clone().requires_grad_() for name, each in model.named_parameters()}
    model.requires_grad_(False)
    return list(weights.values()), lambda **call: torch.func.functional_call(model, weights, (), call)


def test_functional_call(each):
    calls = each.calls()
    warm(each, calls)
    results = []
    for model in each.both:
        parameters, use = functional(model)
        results.append(losses(model, calls, parameters, use=use))
    assert_same(*results)


def frozen_but(*paths):
    def prepare(model):
        model.requires_grad_(False)
        for path in paths:
            model.get_submodule(path).requires_grad_(True)

    return prepare


def leaf_hook(model):
    """A hook marks a result, to get its gradient; these are collected."""
    model.requires_grad_(False)

    def mark(_, args, output):
        if torch.is_grad_enabled():
            output.requires_grad_()
            output.retain_grad()
            model.marked = output

    model.condition_embedder.text_embedder.register_forward_hook(mark)


PREPARE = {
    "all": lambda model: None,
    "a site": frozen_but("condition_embedder.text_embedder"),
    "half a site": frozen_but("condition_embedder.text_embedder.linear_2"),
    "another site": frozen_but("condition_embedder.time_proj"),
    "a block": frozen_but("blocks.0"),
    "way and site": frozen_but("condition_embedder.time_embedder", "blocks.1"),
}


@pytest.mark.parametrize("prepare", [case(f"gradient: of {name}", prepare) for name, prepare in PREPARE.items()])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_what_is_learnt(wan, prepare, checkpointing):
    calls = wan.calls()
    warm(wan, calls)
    for model in wan.both:
        prepare(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
    assert_same(*[losses(model, calls) for model in wan.both])
    wan.agree(calls)


def test_a_result_that_a_hook_marks(wan):
    """Its gradient is of its own forward alone, and goes to nobody else's."""
    calls = wan.calls()
    warm(wan, calls)
    for model in wan.both:
        leaf_hook(model)
    gradients = [[], []]
    for number in range(STEPS):
        for model, found in zip(wan.both, gradients):
            model(**calls[number % 4])[0].float().square().mean().backward()
            found.append(model.marked.grad.clone())
            assert number == 0 or model.marked is not found[0]
    assert_same(gradients[0] * 2, gradients[1] * 2)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_around_the_whole_model(each, reentrant):
    calls = each.calls()
    warm(each, calls)
    results = []
    for model in each.both:

        def use(model=model, **call):
            def forward(latents):
                return model(**call | {"hidden_states": latents})[0]

            return (checkpoint(forward, marked(call), use_reentrant=reentrant),)

        results.append(losses(model, calls, use=use))
    assert_same(*results)


def marked(call):
    return call["hidden_states"].detach().clone().requires_grad_()


@pytest.mark.parametrize(
    "name", [case(f"gradient: for {name}", name) for name in ("timestep", "encoder_hidden_states", "hidden_states")]
)
def test_the_gradient_for_an_argument(wan, name):
    calls = wan.calls(dtype=torch.float32)
    for call in calls:
        call["timestep"] = call["timestep"].float()
    warm(wan, calls)
    for model in wan.both:
        model.requires_grad_(False)
    for number in range(STEPS):
        call = calls[number % 4] | {name: calls[number % 4][name].clone().requires_grad_()}
        ours, theirs = (step(model, call)[name] for model in wan.both)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "name", [case(f"gradient: jvp {name}", name) for name in ("timestep", "encoder_hidden_states")]
)
@pytest.mark.parametrize("how", ["func", "forward_ad"])
def test_forward_mode(wan, name, how):
    calls = wan.calls(1)
    for call in calls:
        call["timestep"] = call["timestep"].float()
    warm(wan, calls)
    for _ in range(3):
        results = []
        for model in wan.both:
            value = calls[0][name]
            tangent = torch.ones_like(value)
            with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                if how == "func":
                    results.append(
                        torch.func.jvp(lambda x, model=model: model(**calls[0] | {name: x})[0], (value,), (tangent,))
                    )
                else:
                    with torch.autograd.forward_ad.dual_level():
                        dual = torch.autograd.forward_ad.make_dual(value, tangent)
                        result = model(**calls[0] | {name: dual})[0]
                        results.append(tuple(torch.autograd.forward_ad.unpack_dual(result)))
        assert all(map(torch.equal, *results)) and results[1][1] is not None
        wan.agree(calls)


def test_forward_mode_of_a_weight(wan):
    """A dual weight inside a site: the tangent reaches the output."""
    calls = wan.calls(1)
    warm(wan, calls)
    results = []
    for model in wan.both:
        linear = model.condition_embedder.text_embedder.linear_1
        weight = linear.weight.detach()
        del linear.weight
        with (
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.autograd.forward_ad.dual_level(),
        ):
            linear.weight = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
            found = [torch.autograd.forward_ad.unpack_dual(model(**calls[0])[0]) for _ in range(3)]
            results.append([tensor.clone() for each in found for tensor in each])
    assert all(map(torch.equal, *results))


@pytest.mark.filterwarnings("ignore")
def test_vmap_over_prompts_and_over_weights(wan):
    calls = wan.calls(1)
    warm(wan, calls)
    prompts = torch.stack([call["encoder_hidden_states"] for call in calls])
    results = []
    for model in wan.both:
        weights = {name: torch.stack([each.detach(), each.detach() * 2]) for name, each in model.named_parameters()}

        def of_prompt(prompt, model=model):
            return model(**calls[0] | {"encoder_hidden_states": prompt})[0]

        def of_weights(weights, model=model):
            return torch.func.functional_call(model, weights, (), calls[0])[0]

        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            results.append([torch.vmap(of_prompt)(prompts) for _ in range(2)] + [torch.vmap(of_weights)(weights)])
    assert all(map(torch.equal, *results))
    wan.agree(calls)


def test_a_trained_copy_beside_a_frozen_one(wan):
    """A teacher that was patched, and a student copied from it, which learns."""
    calls = wan.calls()
    warm(wan, calls)
    students = [copy.deepcopy(model) for model in wan.both]
    assert_same(*[losses(student, calls) for student in students])
    wan.agree(calls)
