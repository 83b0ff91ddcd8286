"""Files that survive a crash: atomic writes, strict JSON, resumable work."""
