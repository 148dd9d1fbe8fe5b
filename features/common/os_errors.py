"""What the operating system refuses, with what to do about it."""

import errno

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM)


def with_remedy(error: BaseException) -> str:
    """The text of an error; where the system refuses a file, or more space, also what to do."""
    if isinstance(error, OSError) and error.errno in (*NO_SPACE, *NOT_ALLOWED):
        path = error.filename or "a file"
        if error.errno in NO_SPACE:
            return f"{path}: {error.strerror}; free some space there and run the same command again"
        return (
            f"{path}: {error.strerror}; mount its file system for writing, give this user permission, or choose "
            "another path"
        )
    return str(error)
