"""What all tests take for granted."""

import signal

# Shells let what they start in the background ignore Ctrl-C, and children inherit that: some tests send it to theirs.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
