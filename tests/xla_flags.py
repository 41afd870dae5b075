"""XLA's flags for tests and for the processes that they start."""

from importlib.metadata import version


def xla_flags(devices=1):
    """So many CPU devices, and programs that are compiled fast: tests compile much and run little.

    Level 0 takes a third of the time to compile of the default, and without the fusion emitters a third of that is left
    (a gradient of a two-layer Llama: 8.4, 2.8 and 1.1 seconds). An XLA that does not know a flag ends its process, so
    the second one is for the version that it was tried on.
    """
    flags = [f"--xla_force_host_platform_device_count={devices}", "--xla_backend_optimization_level=0"]
    if version("jaxlib").startswith("0.10."):
        flags.append("--xla_cpu_use_fusion_emitters=false")
    return " ".join(flags)
