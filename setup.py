import sys
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent


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
    kernels = CppExtension('dn_mmdet.kernels._cpp', ['dn_mmdet/kernels/csrc/cpu.cpp'],
                           extra_compile_args=['-O3', '-g0', '-fopenmp', '-fno-math-errno',
                                               '-fno-trapping-math', '-Wno-psabi'],
                           extra_link_args=['-fopenmp'], optional=True)
    host = CppExtension('dn_mmdet.kernels._host', ['dn_mmdet/kernels/csrc/host.cpp'],
                        extra_compile_args=['-O2', '-g0', '-fvisibility=hidden'],
                        libraries=['dl'], optional=True)
    return dict(ext_modules=[kernels, host],
                cmdclass=dict(build_ext=BuildExtension.with_options(use_ninja=False)))


namespace = {}
exec((root / 'dn_mmdet' / 'version.py').read_text(), namespace)

setup(
    name='dn_mmdet',
    version=namespace['__version__'],
    description='Dynamic Normalization (DN-B, DN-C) as norm layers for MMDetection',
    long_description=(root / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['dn_mmdet', 'dn_mmdet.*']),
    package_data={'dn_mmdet.kernels': ['csrc/*.cpp']},
    **compiled_kernels(),
    python_requires='>=3.10',
    # Neither torch nor a framework: pip would replace the ones that are installed.
    install_requires=['pycocotools', 'rich', 'scikit-learn'],
    extras_require={
        # The pure-Python parts of the two tested stacks. MMCV has to be compiled against
        # the installed torch with --no-build-isolation, which an extra cannot ask for.
        'onedl': ['onedl-mmengine==0.10.12', 'onedl-mmdetection==3.5.1'],
        'openmmlab': ['mmengine==0.10.7', 'mmdet==3.3.0'],
        # tools/compare.py's page with interactive curves; its intervals need scipy.
        'report': ['plotly', 'scipy'],
        # configs/mobilenetv2_*. It depends on neither stack and works beside both.
        'cls': ['onedl-mmpretrain==1.3.6'],
        'export': ['onnx', 'onnxruntime', 'onnxscript'],
        'tests': ['hypothesis', 'pytest', 'pytest-timeout', 'pytest-xdist', 'ruff', 'scipy',
                  'timm'],
    },
)
