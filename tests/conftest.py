"""What all tests share: one thread, and the same random numbers whichever tests ran before."""

import pytest
import torch

# The tensors are tiny, so threads gain nothing, and those of programs that run side by side get in each other's way.
# With one, sums are also always taken in the same order.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory):
    """Prompts that tests encode are not kept in the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOPUSA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _cpu():
    """A command that is not told a device takes the CPU, where the tests have what they compare with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.backends.mps, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
