"""Storage in this process, on one Redis or on a cluster; knows no HTTP and no wire format."""
