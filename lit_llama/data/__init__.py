"""Documents -> token store -> packed training windows; each step is a module of its own."""
