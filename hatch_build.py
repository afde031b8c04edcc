"""Build hook: compile the CPU kernels of the loss into the wheel, or beside their sources for an editable install.

Without a compiler the package is built without them, and they are compiled at first use.
"""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

NATIVE = Path("eaftdrope", "loss", "native")


class NativeBuildHook(BuildHookInterface):
    """Add the compiled library to the wheel, and its platform to the name of the wheel."""

    def initialize(self, version: str, build_data: dict) -> None:
        self._folder = None
        build = _load_build(Path(self.root) / NATIVE / "build.py")
        try:
            if version == "editable":
                self._build_in_place(build)
            else:
                self._build_into_wheel(build, build_data)
        except build.BuildError as error:
            self.app.display_warning(f"eaftdrope is built without its CPU kernels (compiled at first use): {error}")

    def finalize(self, version: str, build_data: dict, artifact_path: str) -> None:
        if self._folder is not None:
            self._folder.cleanup()

    def _build_in_place(self, build: ModuleType) -> None:
        library = build.SOURCES / build.library_name()
        for stale in build.SOURCES.glob("eaft_cpu-*.so"):
            if stale != library:
                stale.unlink()
        if not library.is_file():
            build.compile_library(library)

    def _build_into_wheel(self, build: ModuleType, build_data: dict) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="eaftdrope-build-")
        library = Path(self._folder.name) / build.library_name()
        build.compile_library(library)
        build_data["force_include"][str(library)] = str(NATIVE / library.name)
        build_data["pure_python"] = False
        # Any Python 3, since ctypes loads the library. Not manylinux, since it is linked with this system's C++ library.
        platform = next(
            tag.platform for tag in sys_tags() if "linux_" not in tag.platform or tag.platform.startswith("linux_")
        )
        build_data["tag"] = f"py3-none-{platform}"


def _load_build(path: Path) -> ModuleType:
    """Load build.py by its path: importing the package would need all its dependencies."""
    spec = importlib.util.spec_from_file_location("eaftdrope_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
