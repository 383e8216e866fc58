"""What every vLLM process imports where SparQ is installed, used or not: `--attention-backend CUSTOM` becomes SparQ.

A module beside the packages, so that a vLLM that does not use SparQ pays for no import. What it registers is in
sparq/vllm.
"""

from __future__ import annotations

import logging
import os
from typing import Any

SUPPORTED = ">=0.32,<0.34"  # what it uses has a "temporary compatibility API" among it
CPU_BACKEND = "sparq.vllm.cpu.SparqCPUBackend"
GPU_BACKEND = "sparq.vllm.gpu.SparqGPUBackend"
CPU_PAGE = 512  # positions of a page, where the user names none: smaller ones cost decode steps more (docs/vllm.md)

_logger = logging.getLogger("vllm.sparq")  # below vLLM's own, so that it is seen with it


def register() -> None:
    """The entry point `vllm.general_plugins`.  vLLM calls it in every process, perhaps more than once.

    It must not raise, which would end a vLLM that may not want SparQ at all: where this version is not served it says
    so, and `--attention-backend CUSTOM` is then an error of vLLM's.
    """
    try:
        version = vllm_version()
        from packaging.specifiers import SpecifierSet

        if not SpecifierSet(SUPPORTED).contains(version, prereleases=True):
            _logger.warning("SparQ is not registered: it serves vLLM %s, and this is %s", SUPPORTED, version)
            return
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        if current_platform.is_cpu():
            register_backend(AttentionBackendEnum.CUSTOM, CPU_BACKEND)
            _let_the_cpu_platform_select()
        elif current_platform.is_cuda():
            register_backend(AttentionBackendEnum.CUSTOM, GPU_BACKEND)
    except Exception as error:
        _logger.warning("SparQ is not registered: %s: %s", type(error).__name__, error)


def vllm_version() -> str:
    """vLLM's own version, without what a build adds to it."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def _let_the_cpu_platform_select() -> None:
    """vLLM's platform for CPUs knows one backend and passes over any other that is asked for.

    The way that is meant for it, a platform of our own, would take the place of vLLM's for everybody who has SparQ
    installed.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if getattr(CpuPlatform, "_sparq_selects", False):
        return
    select, update = CpuPlatform.get_attn_backend_cls.__func__, CpuPlatform.check_and_update_config.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *rest: Any, **named: Any
    ) -> str:
        if selected_backend != AttentionBackendEnum.CUSTOM or AttentionBackendEnum.CUSTOM.get_path() != CPU_BACKEND:
            return select(cls, selected_backend, attn_selector_config, *rest, **named)
        from sparq.vllm.cpu import SparqCPUBackend

        SparqCPUBackend.check(attn_selector_config)
        return CPU_BACKEND

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        asked = vllm_config.cache_config.user_specified_block_size
        update(cls, vllm_config)
        if vllm_config.attention_config.backend == AttentionBackendEnum.CUSTOM:
            from sparq.vllm.knobs import config_of

            config_of(vllm_config)  # a wrong knob is an error now, not when a model has been loaded
            # PyTorch's own switch, for the processes that are started after this. To find rows in pages of 4 KB costs
            # a sixth of the time that they are read in.
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
            if not asked:
                vllm_config.cache_config.block_size = CPU_PAGE

    CpuPlatform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    CpuPlatform.check_and_update_config = classmethod(check_and_update_config)
    CpuPlatform._sparq_selects = True
