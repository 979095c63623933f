"""Measuring the head: peers, checks, interleaved races, counts and ceilings.

``moe3d bench``, the pytest-benchmark suites in the repository's ``bench`` folder and ``make gpu`` are fronts of this
package. The way up: :mod:`.case` (what is computed) -> :mod:`.peers`, :mod:`.heads`, :mod:`.training` (who computes it)
-> :mod:`.accuracy` (is it right) -> :mod:`.race` (how long does it take) -> :mod:`.suites` -> :mod:`.session` ->
:mod:`.records` and :mod:`.tables`. :mod:`.roofline` counts what the work costs at least.
"""
