"""What the command line's ``compress``, ``train``, ``compile``, ``profile`` and ``compare`` do."""

from .comparing import run_compare
from .compiling import run_compile
from .compressing import check_compress, run_compress
from .job import CompareJob, CompileJob, CompressJob, ProfileJob, TrainJob
from .profiling import run_profile
from .training import run_train

__all__ = [
    "CompareJob",
    "CompileJob",
    "CompressJob",
    "ProfileJob",
    "TrainJob",
    "check_compress",
    "run_compare",
    "run_compile",
    "run_compress",
    "run_profile",
    "run_train",
]
