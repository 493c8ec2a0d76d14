"""What the command line's ``compress``, ``train``, ``compile`` and ``compare`` do."""

from .comparing import run_compare
from .compiling import run_compile
from .compressing import check_compress, run_compress
from .settings import CompareJob, CompileJob, CompressJob, TrainJob
from .training import run_train

__all__ = [
    "CompareJob",
    "CompileJob",
    "CompressJob",
    "TrainJob",
    "check_compress",
    "run_compare",
    "run_compile",
    "run_compress",
    "run_train",
]
