"""A folder of compiled kernels for others to read: the users of an image, a team."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from .cache import KernelCache
from .compiled import Compiled, Options
from .compiler import cache_key, made_of
from .folder import HAS_OWNERS, UnusableFolderError, shown
from .source import Source
from .store import GENERATION, write

_FOLDER_MODE, _FILE_MODE = 0o755, 0o644  # whatever the umask is: others read them, and write neither


class ExportFolder:
    """``folder``, made if it is not there, for whoever names it in ``LOWBIT_CACHE_READONLY``.

    Raises:
        UnusableFolderError: it cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self._entries = self.folder / GENERATION
        self._compiler = KernelCache(keeps=False)  # (kernels that this user has are read, and none is added)
        key = secrets.token_hex(32)
        try:
            for new in reversed([f for f in (self._entries, *self._entries.parents) if not f.exists()]):
                new.mkdir(exist_ok=True)
                new.chmod(_FOLDER_MODE)
            write(self._entries, key, {}, Compiled(b"probe", {}, ()))  # (what fails is known before the work)
            (self._entries / f"{key}.bin").unlink()
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
            raise UnusableFolderError(
                f"{shown(self.folder)} cannot be written ({why}): choose another folder"
            ) from None

    def add(self, source: Source, options: Options) -> None:
        """Put a kernel there, compiled if need be.

        Raises:
            KernelUnavailableError: it cannot be compiled.
            UnusableFolderError: it cannot be written.
        """
        compiled = self._compiler.get(source, options)
        try:
            write(self._entries, cache_key(source, options), made_of(source, options), compiled, _FILE_MODE)
        except OSError as error:
            raise UnusableFolderError(f"{self.folder} cannot be written ({error.strerror or error})") from None

    def remarks(self) -> list[str]:
        """What stands against its use by others, a line each: nothing, or who can read and write it besides."""
        found = []
        for folder in (self._entries, *self._entries.parents) if HAS_OWNERS else ():
            mode = stat.S_IMODE(folder.stat().st_mode)
            if mode & 0o005 != 0o005 and folder in (self._entries, self.folder):
                found.append(f"others cannot read it: {folder} has mode {mode:o}")
            elif not mode & 0o001:
                found.append(f"others cannot reach it: {folder} has mode {mode:o}")
            if mode & 0o022 and not mode & stat.S_ISVTX:
                found.append(f"others can change it, and readers run what is in it: {folder} has mode {mode:o}")
        return found
