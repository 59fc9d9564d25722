// What torch asks of a CUDA build before it lets a tensor on "cuda:0" through autograd, answered by a machine without one:
// there is one device, it is always the current one, and all its streams are the default stream, on which nothing waits.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using c10::Device, c10::DeviceIndex, c10::DeviceType, c10::Stream;

struct Guard : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device only() { return Device(DeviceType::CUDA, 0); }
  static Stream one() { return Stream(Stream::DEFAULT, only()); }
  Device getDevice() const override { return only(); }
  Device exchangeDevice(Device) const override { return only(); }
  Stream getStream(Device) const noexcept override { return one(); }
  Stream getDefaultStream(Device) const override { return one(); }
  Stream getNewStream(Device, int) const override { return one(); }
  Stream exchangeStream(Stream) const noexcept override { return one(); }
  void synchronizeStream(const Stream&) const override {}
  bool queryStream(const Stream&) const override { return true; }
  void record(void** event, const Stream&, const DeviceIndex, const c10::EventFlag) const override { *event = this_event(); }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  static void* this_event() { return reinterpret_cast<void*>(1); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isAvailable() const override { return true; }
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
