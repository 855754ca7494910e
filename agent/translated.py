"""What store and kernel say, as errors of the CNI contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from agent.state import KernelError
from agent.store import AddressNotInRange, AddressTaken, AttachmentExists, HostPortTaken, RangeExhausted, StoreError
from cni.errors import CniError, Code


@contextmanager
def translated() -> Iterator[None]:
    """Make CNI errors of what store and kernel say."""
    try:
        yield
    except TimeoutError as error:
        raise CniError(Code.TRY_AGAIN_LATER, str(error)) from error
    except KernelError as error:
        raise CniError(Code.KERNEL_REFUSED, str(error)) from error
    except StoreError as error:
        raise CniError(Code.IO_FAILURE, str(error)) from error
    except AttachmentExists as error:
        message = "the container has this interface already; DEL it first"
        raise CniError(Code.ALREADY_ATTACHED, message, str(error)) from error
    except RangeExhausted as error:
        raise CniError(Code.ADDRESSES_EXHAUSTED, str(error)) from error
    except (AddressTaken, HostPortTaken) as error:
        raise CniError(Code.ADDRESS_TAKEN, str(error)) from error
    except AddressNotInRange as error:
        raise CniError(Code.INVALID_NETWORK_CONFIG, str(error)) from error
