"""Files that survive a crash: atomic writes, lists of hashes, a lock, strict JSON and TOML, resumable work."""
