"""Build hook: compiles the CPU kernels of the loss into the wheel, or beside their sources for an editable install.

Where no compiler is found the package is built without them, and they are compiled at first use instead.
"""

import importlib.util
import tempfile
from pathlib import Path
from types import ModuleType

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import sys_tags

NATIVE = Path("eaftdrope", "loss", "native")


class NativeBuildHook(BuildHookInterface):
    """Adds the compiled library, and says in the wheel's name for which platform it is."""

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
        # any Python 3: the library is loaded by ctypes. Not manylinux: it is linked with the C++ library found here.
        platform = next(
            tag.platform for tag in sys_tags() if "linux_" not in tag.platform or tag.platform.startswith("linux_")
        )
        build_data["tag"] = f"py3-none-{platform}"


def _load_build(path: Path) -> ModuleType:
    """build.py by its path: importing the package would need everything that it depends on."""
    spec = importlib.util.spec_from_file_location("eaftdrope_native_build", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
