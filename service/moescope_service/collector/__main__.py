"""``python -m moescope_service.collector ADDRESS PARENT_PID``."""

from moescope_service.collector.process import main

main()
