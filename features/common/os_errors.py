"""Explains in one line what the operating system or a GPU refuses, with a remedy if one is known."""

import errno
import re

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)
_OTHERS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of this path is a file, not a folder: choose another path, or move the file away",
    errno.EISDIR: "this path is a folder, not a file: choose another path",
    errno.EEXIST: "choose another path, or move it away",
}
_SHORTAGE = re.compile("out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED")


def gpu_shortage(error: BaseException) -> str | None:
    """The part of torch's error about a GPU's lack of memory that says what is known; None if it is another error.

    An OutOfMemoryError says "CUDA out of memory. Tried to allocate ... . GPU 0 has a total capacity of ... of which ...
    is free. ..."; an error of another type, "CUDA error: out of memory", if a GPU is so full that CUDA cannot start.
    NCCL says it in the last line of several. cuBLAS and cuDNN have a status for it, but cuBLAS also gives its own after
    an assertion failed in a kernel.
    """
    line = next((line for line in str(error).split("\n") if _SHORTAGE.search(line)), None)
    if line is None:
        return None
    if "out of memory" in line:
        return ". ".join(line.split(". ")[:3])
    return f"{line} (no GPU memory is free, or an earlier kernel failed, which CUDA_LAUNCH_BLOCKING=1 would show)"


def remedy_of(error: OSError) -> str | None:
    """What to do about a path that the system refuses to write, or to give more space; None if nothing is known."""
    if error.errno in NO_SPACE:
        return "free some space there"
    if error.errno in NOT_ALLOWED:
        # A file that may not be read is not helped by another mount.
        return "mount its file system for writing" if error.errno == errno.EROFS else "give this user permission"
    return None


def with_remedy(error: BaseException) -> str:
    """The text of an error, with a remedy if the system refused a path or more space."""
    if isinstance(error, OSError) and (remedy := remedy_of(error)):
        path = error.filename or "a file or standard output"  # neither names itself after a failed write
        then = " and run the same command again" if error.errno in NO_SPACE else ", or choose another path"
        return f"{path}: {error.strerror}; {remedy}{then}"
    if isinstance(error, OSError) and error.filename and error.errno in _OTHERS:
        return f"{error.filename}: {error.strerror}; {_OTHERS[error.errno]}"
    if isinstance(error, OSError) and "temporary directory" in str(error.strerror):  # as the module tempfile raises it
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    return str(error)
