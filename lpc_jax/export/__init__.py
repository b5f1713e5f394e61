"""A policy as files that other programs load; `out` holds those that go along."""
