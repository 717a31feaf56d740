"""Values of settings."""

SECRET = "s3cr3t-of-a-test"


FILES = ("REDIS_SSL_CA_CERTS", "REDIS_SSL_CERTFILE", "REDIS_SSL_KEYFILE")
