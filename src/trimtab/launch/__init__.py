"""Commands as several processes: started, watched, and ended together."""

from trimtab.launch.start import one_process_notice, refuse_other_devices, start_processes, starts_processes
from trimtab.launch.watch import End
from trimtab.launch.worker import run_together

__all__ = ["End", "one_process_notice", "refuse_other_devices", "run_together", "start_processes", "starts_processes"]
