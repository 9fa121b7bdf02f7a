"""The words that labels may take: phases, causes, states, reasons, faults."""

PHASES = ("start", "restore", "train", "checkpoint", "evaluation")
TIMED = ("start", "restore", "step", "data_wait", "checkpoint", "evaluation")
CAUSES = (  # of the goodput ledger, see launcher/ledger.py
    "productive",
    "queue",
    "start",
    "restore",
    "data_wait",
    "checkpoint",
    "evaluation",
    "replay",
    "hang",
    "unknown",
)
RUN_STATES = ("pending", "running", "preempted", "stalled", "stopped", "given_up", "done")
RESTART_REASONS = ("preempted", "stopped", "crash", "lost", "bad_input")
FAULTS = ("port", "target", "events", "files", "sinks")
PARAMETER_GROUPS = ("vision", "text", "embeddings", "new")  # see train/health.py
