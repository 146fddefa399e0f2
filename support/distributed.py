"""Training by several processes, each with a GPU of its own, on one machine or many that see the same
folders. PyTorch's torchrun starts them:

    torchrun --nproc-per-node 8 train.py --data clips/ --batch 8

Each process takes its part of every batch. Of every parameter, its gradient and its optimizer state it keeps one slice;
the slices of a block are put together while that block computes, and gradients become means over the processes: this
is PyTorch's FSDP2. What is drawn at random follows from seed and step, so nobody has to be told. The first process
reads the weights and writes the folder of the run. For a process on its own, everything here does nothing.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from support import cli


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 is the first."""
    return dist.get_rank() if size() > 1 else 0


@contextlib.contextmanager
def joined(device: str | None) -> Iterator[str | None]:
    """Work with the other processes of this torchrun, if there are any, to the end of the block.

    Takes the device that the user named, and yields this process's own. What processes other than the first print is
    dropped, but not what ends them.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield device
        return
    kind = cli.pick_device(device)
    if kind not in ("cuda", "cpu"):
        raise ValueError(
            f"got --device {kind} for several processes, expected cuda, where each takes its own GPU, or cpu"
        )
    own = "cpu" if kind == "cpu" else cli.pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
    if kind == "cuda":
        torch.cuda.set_device(own)
    # Others wait while the first one writes a state. That a process has died, torchrun notices, and ends the rest.
    backend, gpu = ("nccl", torch.device(own)) if kind == "cuda" else ("gloo", None)
    dist.init_process_group(backend, timeout=timedelta(hours=1), device_id=gpu)
    try:
        with contextlib.ExitStack() as stack:
            if rank() > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            print(f"{size()} processes; should one die, the same command with --resume goes on from the last save")
            yield own
    except KeyboardInterrupt:
        if rank() > 0:
            sys.exit(130)  # the first one says it for all
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = str(error).splitlines()[0][:200]
        raise ConnectionError(
            f"process {rank()} lost the others, of which torchrun says what ended first ({reason}); "
            "go on from the last save with the same command and --resume"
        ) from error
    dist.destroy_process_group()


def shares() -> Iterator[slice]:
    """Slices of a list of things to make and keep on disk: this process's share, and when all are done, everything."""
    if size() > 1:
        yield slice(rank(), None, size())
        dist.barrier()
    yield slice(None)


def total(number: float, device: str) -> float:
    """The sum of a number over the processes."""
    if size() == 1:
        return number
    tensor = torch.tensor(number, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.item()


def agreed(value):
    """The value that the first process has."""
    if size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def shard(model: nn.Module, units: Iterable[nn.Module | list[nn.Module]], device: str) -> None:
    """Give each process its slice of every parameter, on its device.

    The values come from the first process; the model of the others may be without memory. A unit is what is put
    together at a time, by calling it; units within others come first. What is in none is put together for the whole
    forward pass.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    values = model.state_dict() if rank() == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(torch.device(device).type, (size(),))
    for unit in (*units, model):
        fully_shard(unit, mesh=mesh)
    with warnings.catch_warnings():  # PyTorch warns of how it asks itself for the device
        warnings.simplefilter("ignore")
        set_model_state_dict(model, values, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


def gathered(model: nn.Module, outline: nn.Module) -> nn.Module:
    """The `outline` of a sharded model; for the first process, what is trained in it is filled in, on the CPU."""
    trained = {name for name, parameter in outline.named_parameters() if parameter.requires_grad}
    values = whole({name: tensor for name, tensor in model.state_dict().items() if name in trained})
    if rank() == 0:
        outline.load_state_dict(values, strict=False, assign=True)
    return outline


def whole(state):
    """A nest of dicts and lists with its sliced tensors put together, on the first process's CPU; None for others'."""
    if isinstance(state, dict):
        return {name: whole(part) for name, part in state.items()}
    if isinstance(state, list):
        return [whole(part) for part in state]
    if not hasattr(state, "full_tensor"):
        return state
    tensor = state.full_tensor()
    return tensor.cpu() if rank() == 0 else None


def sliced(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's slice of a tensor that all have, if `like` is of its shape and sliced; else the tensor."""
    if not hasattr(like, "full_tensor") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
