"""Tools for whoever writes a spec: `check` tries one on its model, `new` begins one."""
