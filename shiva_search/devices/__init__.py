"""Devices and their sensors: what runs a model, and what can be measured while it runs."""

from .base import Device, EnergySample, SensorReport, check_sensors, list_devices, no_graphs, open_device

__all__ = ["Device", "EnergySample", "SensorReport", "check_sensors", "list_devices", "no_graphs", "open_device"]
