"""The signals that stop a run between two steps."""

import contextlib
import signal
import threading

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C; kill and batch queues; a batch queue's warning before the time limit


@contextlib.contextmanager
def stop_signals():
    """Yield a list that collects the numbers of received signals; a second SIGINT raises KeyboardInterrupt."""
    pending_signals = []

    def handle(signum, frame):
        if signum == signal.SIGINT and signum in pending_signals:
            raise KeyboardInterrupt
        pending_signals.append(signum)

    if threading.current_thread() is not threading.main_thread():  # handlers can only be set there
        yield pending_signals
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.signal(number, handle) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield pending_signals
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
