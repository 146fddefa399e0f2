"""Training by several processes, each with a GPU of its own, on one machine or many that see the same folders.
PyTorch's torchrun starts them:

    torchrun --nproc-per-node 8 train.py --data clips/ --batch 8

Each process takes its share of every batch, and holds one shard of every parameter, gradient and optimizer state
(FSDP2). What is drawn at random follows from seed and step, so nobody has to be told. The first process reads the
weights and writes the folder of the run. For a process on its own, everything here does nothing.
"""

import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


def size() -> int:
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them; 0 is the first."""
    return dist.get_rank() if size() > 1 else 0


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Work with the other processes of this torchrun, if there are any, to the end of the block.

    device: cuda or cpu, for all of them; yields the device of this process. Only the first process prints, but any one
    can say what ended it.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield device
        return
    if device not in ("cuda", "cpu"):
        raise ValueError(f"got --device {device} for several processes, expected cuda, a GPU for each of them, or cpu")
    gpu = None if device == "cpu" else torch.device(device, int(os.environ["LOCAL_RANK"]))
    if gpu:
        if gpu.index >= torch.cuda.device_count():
            raise ValueError(f"got {gpu.index + 1} or more processes on this machine, expected one for each GPU")
        torch.cuda.set_device(gpu)
    # Others wait while the first one writes a state. torchrun notices when a process has died, and ends the rest.
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(hours=1), device_id=gpu)
    try:
        with open(os.devnull, "w") if rank() > 0 else nullcontext() as nowhere:
            with redirect_stdout(nowhere or sys.stdout), redirect_stderr(nowhere or sys.stderr):
                print(f"{size()} processes; should one die, the same command with --resume goes on from the last save")
                yield str(gpu or device)
    except KeyboardInterrupt:
        if rank() > 0:
            sys.exit(130)  # the first one says it for all
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        raise ConnectionError(
            f"process {rank()} lost the others, of which torchrun says what ended first "
            f"({str(error).splitlines()[0][:200]}); go on from the last save with the same command and --resume"
        ) from error
    gc.collect()  # a sharded model that outlives its process group can abort the process as it ends
    dist.destroy_process_group()


def my_share(items: Sequence) -> Sequence:
    """The items that this process takes: every `size()`-th, starting at its rank."""
    return items[rank() :: size()]


def in_shares(items: Sequence, at_a_time: int) -> Iterator[Sequence]:
    """This process's share of the items, so many at a time, in as many parts as every process gets.

    All must call a sharded network equally often: a process for which nothing is left gets an item of the first one's.
    """
    for start in range(0, len(items), at_a_time * size()):
        together = items[start : start + at_a_time * size()]
        yield my_share(together) or together[:1]


def each_its_share(load: Callable[[Sequence], Any], items: Sequence) -> Any:
    """load(items), where load stores what it computes: each process computes its share, then each reads everything."""
    if size() > 1:
        load(my_share(items))
        dist.barrier()
    return load(items)


def all_reduce(number: float, device: str) -> float:
    """The sum of a number over the processes."""
    total = torch.tensor(number, dtype=torch.float64, device=device if size() > 1 else "cpu")
    if size() > 1:
        dist.all_reduce(total)
    return total.item()


def gather(value: Any) -> list:
    """The values that the processes have, in their order."""
    values = [value] * size()
    if size() > 1:
        dist.all_gather_object(values, value)
    return values


def broadcast(value: Any) -> Any:
    """The value that the first process has."""
    values = [value]
    if size() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def shard(model: nn.Module, units: Iterable[nn.Module | list[nn.Module]], device: str) -> None:
    """Give each process its shard of every parameter, on its device.

    The values come from the first process; the model of the others may be on "meta". A unit's parameters are gathered
    when it is called, those in no unit for the whole forward pass. List a unit before the one that contains it.
    """
    # Here, as they take half a second to import, which a process on its own need not wait for.
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
