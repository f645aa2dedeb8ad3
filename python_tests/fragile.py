"""An environment that goes wrong, importable where a process of its own is begun."""

from __future__ import annotations

import os
import time

from sadkern.evaluate.environments import Outcome


class Unpicklable(Exception):
    def __init__(self, what, where):
        super().__init__(f"{what} in {where}")


class Fragile:
    name, task = "fragile", "1"

    def __init__(self, how):
        self.how = how
        if how == "never begins":
            raise ValueError("no such game")

    def reset(self):
        self.count = 0
        return f"pid {os.getpid()}"

    def step(self, action):
        if self.how == "hangs":
            time.sleep(600)
        if self.how == "dies":
            os._exit(3)
        if self.how == "raises":
            raise OSError("the engine is gone")
        if self.how == "raises what cannot be sent":
            raise Unpicklable("a fault", "the engine")
        self.count += 1
        return Outcome(f"{action} {self.count}", 1.0, done=True, success=True, facts={"n": 1})

    def close(self):
        if self.how == "does not close":
            raise OSError("it is stuck")
