"""``python -m moescope_service.collector ADDRESS``."""

from moescope_service.collector.process import main

main()
