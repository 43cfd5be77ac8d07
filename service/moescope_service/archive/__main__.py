"""``python -m moescope_service.archive ADDRESS PARENT_PID EPOCH``."""

from moescope_service.archive.process import main

main()
