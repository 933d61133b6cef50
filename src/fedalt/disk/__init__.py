"""Reading what a folder holds so that damage has a name: checked forms, and files by digest."""
