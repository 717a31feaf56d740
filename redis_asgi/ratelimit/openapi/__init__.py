"""The answers of limits in an app's OpenAPI document."""
