"""Who may read a file of weights: safetensors writes each for its owner only (0600), whatever the umask."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def honour_umask(folder: str | Path) -> None:
    """Gives the safetensors files of a folder, just written, the permissions that other new files get.

    Links and files with several names are left alone: they are somebody else's too.
    """
    # the only way to read it is to set it; for that moment, the stricter one
    umask = os.umask(0o077)
    os.umask(umask)
    for file in Path(folder).glob("*.safetensors"):
        found = file.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and stat.S_IMODE(found.st_mode) == 0o600:
            file.chmod(0o666 & ~umask)
