"""One file per screen. A screen gets a state, asks the workflow in threads, and hands a changed state on."""
