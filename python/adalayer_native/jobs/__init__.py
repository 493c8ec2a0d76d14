"""What the command line's ``compress``, ``train`` and ``compile`` do."""

from .compiling import run_compile
from .compressing import check_compress, run_compress
from .settings import CompileJob, CompressJob, TrainJob
from .training import run_train

__all__ = [
    "CompileJob",
    "CompressJob",
    "TrainJob",
    "check_compress",
    "run_compile",
    "run_compress",
    "run_train",
]
