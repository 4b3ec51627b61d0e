"""The compiled extensions. Everything else about the package stands in pyproject.toml."""

import sys

from setuptools import setup


def compiled_kernels():
    """The CPU kernels and what launches the GPU's, where torch and GCC are at hand.

    Without the first, layers on CPUs run on torch's own operators (`backend='torch'`);
    without the second, the Triton kernels are launched from Python. Neither needs CUDA.

    They are compiled against the installed torch, which pip hides from a build unless told
    --no-build-isolation. A compiler that fails is a warning, not an error.
    """
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    if not sys.platform.startswith('linux'):  # vector types and target_clones are GCC's
        return {}
    kernels = CppExtension(
        'dn_mmdet.kernels._cpp',
        ['dn_mmdet/kernels/csrc/cpu.cpp'],
        extra_compile_args=[
            '-O3',
            '-g0',
            '-fopenmp',
            '-fno-math-errno',
            '-fno-trapping-math',
            '-Wno-psabi',
        ],
        extra_link_args=['-fopenmp'],
        optional=True,
    )
    host = CppExtension(
        'dn_mmdet.kernels._host',
        ['dn_mmdet/kernels/csrc/host.cpp'],
        extra_compile_args=['-O2', '-g0', '-fvisibility=hidden'],
        libraries=['dl'],
        optional=True,
    )
    return dict(
        ext_modules=[kernels, host],
        cmdclass=dict(build_ext=BuildExtension.with_options(use_ninja=False)),
    )


setup(**compiled_kernels())
