"""``python -m moescope_service.collector ADDRESS PARENT_PID EPOCH``."""

from moescope_service.collector.process import main

main()
