"""What servers and offline scripts share: ids, registration, the way to the collector.

Nothing here knows HTTP; the only code that touches vLLM's output processor.
"""
