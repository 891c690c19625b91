"""Ctrl-C that lets the step at hand finish."""

import signal


class Stop:
  """Notes the first Ctrl-C or SIGTERM; the second one ends the program."""

  def __enter__(self):
    self.signal = 0
    catch = lambda s: (s, signal.signal(s, self._note))
    self._before = dict(map(catch, (signal.SIGINT, signal.SIGTERM)))
    return self

  def _note(self, number, frame):
    del frame
    self.signal = number
    self.__exit__()

  def __exit__(self, *unused):
    for number, handler in self._before.items():
      signal.signal(number, handler)
