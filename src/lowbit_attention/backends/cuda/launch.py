"""Loading machine code and launching it on PyTorch's current stream, with little work on the host."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from ...errors import KernelUnavailableError, LowbitError
from .instances import Instance
from .jit.bindings import import_bindings, one_line
from .jit.cache import KernelCache
from .jit.compiled import Compiled

_MOST_CONFIGS = 1024


_DOCTOR = "`lowbit doctor` looks whether the driver and the run-time compiler fit together"


class LaunchError(LowbitError):
    """The driver refused to launch a kernel."""


class LoadError(KernelUnavailableError):
    """The driver refused to load a kernel's machine code, or there is no driver."""


@lru_cache(maxsize=1)
def cache() -> KernelCache:
    """The process's kernel cache."""
    return KernelCache()


class Kernel:
    """One entry of a compiled instance, ready to launch on any device of its architecture."""

    def __init__(self, compiled: Compiled, name: str, threads: int, shared_bytes: int = 0) -> None:
        """Load it on every device of the current one's architecture.

        Raises:
            LoadError: the driver refuses it, or there is none.
            CompilerMissingError, CompilerBrokenError: as `import_bindings`.
        """
        driver = self._driver = import_bindings("cuda.bindings.driver")
        self._name, self._threads, self._shared_bytes = name, threads, shared_bytes
        try:
            self._load(compiled)
        except (KernelUnavailableError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # the bindings' own, of a driver that cannot be loaded, and torch's
            raise LoadError(f"{name} cannot be loaded ({one_line(error)})", _DOCTOR) from error
        self._success = driver.CUresult.CUDA_SUCCESS
        self._launch = driver.cuLaunchKernelEx
        self._configs: dict[tuple[Any, ...], Any] = {}

    def _load(self, compiled: Compiled) -> None:
        driver = self._driver
        torch.cuda.current_stream().cuda_stream  # noqa: B018  (the device's context exists and is current from here on)
        self._library = self._loaded(driver.cuLibraryLoadData(compiled.cubin, [], [], 0, [], [], 0))
        kernel = self._loaded(driver.cuLibraryGetKernel(self._library, self._name.encode()))
        self._loaded(driver.cuKernelGetFunction(kernel))  # (the driver loads lazily: what it refuses shows here)
        if self._shared_bytes:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            for device in range(torch.cuda.device_count()):
                if torch.cuda.get_device_capability(device) == torch.cuda.get_device_capability():
                    self._loaded(driver.cuKernelSetAttribute(attribute, self._shared_bytes, kernel, device))
        self._function = driver.CUfunction(int(kernel))

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: int,
        arguments: int,
        overlaps: bool = False,
        cluster: int = 1,
    ) -> None:
        """Launch on the current stream of ``device``, which must be current.

        ``arguments``: the address that `Arguments` has; the driver copies them.
        ``overlaps``: the kernel may begin while the one before it ends, and waits for it itself (programmatic
        dependent launch). ``cluster``: so many neighbouring blocks (in the first dimension, whose size is a
        multiple) are a thread block cluster.
        """
        stream = torch._C._cuda_getCurrentRawStream(device)
        key = (grid, stream, overlaps, cluster)
        config = self._configs.get(key)
        if config is None:
            if len(self._configs) >= _MOST_CONFIGS:
                self._configs.clear()
            config = self._configs[key] = self._config(*key)
        result = self._launch(config, self._function, arguments, 0)[0]
        if result != self._success:
            if result == self._driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread's first use of CUDA
                torch.cuda.set_device(device)
                torch.cuda.synchronize(device)
                result = self._launch(config, self._function, arguments, 0)[0]
            self._checked((result,))

    def _config(self, grid: tuple[int, int, int], stream: int, overlaps: bool, cluster: int) -> Any:
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = self._threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        config.hStream = stream
        attributes = []
        if overlaps:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            attribute.value.programmaticStreamSerializationAllowed = 1
            attributes.append(attribute)
        if cluster > 1:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            size = attribute.value.clusterDim
            size.x, size.y, size.z = cluster, 1, 1
            attributes.append(attribute)
        if attributes:
            config.attrs = attributes
            config.numAttrs = len(attributes)
        return config

    def _loaded(self, answer: tuple[Any, ...]) -> Any:
        """What the driver answers to a step of loading."""
        if int(answer[0]) != 0:
            raise LoadError(f"{self._name} cannot be loaded (the driver says {self._error(answer[0])})", _DOCTOR)
        return answer[1] if len(answer) > 1 else None

    def _checked(self, answer: tuple[Any, ...]) -> None:
        if int(answer[0]) != 0:
            raise LaunchError(f"{self._name}: the driver says {self._error(answer[0])}; {_DOCTOR}")

    def _error(self, code: Any) -> str:
        _, text = self._driver.cuGetErrorString(code)
        return f"{text.decode() if text else str(code)!r} (error {int(code)})"


def load(instance: Instance, name: str, threads: int, shared_bytes: int = 0) -> Kernel:
    """Compile (or read from the cache) and load.

    Raises:
        KernelUnavailableError: it cannot be had, for whichever reason.
        CaptureError: a CUDA graph is being captured, and it would have to be compiled or read.
    """
    return Kernel(cache().get(instance.source(), instance.options()), name, threads, shared_bytes)
