"""Data: text in, NumPy out; never touches a device."""
