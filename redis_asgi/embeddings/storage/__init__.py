"""Who keeps: this process, one Redis or a cluster; knows no HTTP and no wire format."""
