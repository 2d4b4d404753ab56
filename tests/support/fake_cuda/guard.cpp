// The guard and the hooks of a CUDA device without CUDA: autograd asks them for the device and stream of a tensor.
// Tensors that say cuda:N (fake_tensor.py) live in ordinary memory, so there is nothing to switch or to wait for.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
using namespace c10;

thread_local DeviceIndex current = 0;
DeviceIndex devices = 1;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device next) const override {
    Device before(DeviceType::CUDA, current);
    current = next.index();
    return before;
  }
  Device getDevice() const override { return Device(DeviceType::CUDA, current); }
  void setDevice(Device next) const override { current = next.index(); }
  void uncheckedSetDevice(Device next) const noexcept override { current = next.index(); }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  Stream getStream(Device device) const noexcept override { return Stream(Stream::DEFAULT, device); }
  Stream getNewStream(Device device, int) const override { return Stream(Stream::DEFAULT, device); }
  Stream exchangeStream(Stream stream) const noexcept override { return Stream(Stream::DEFAULT, stream.device()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
};
impl::DeviceGuardImplRegistrar registrar(DeviceType::CUDA, new Guard);
} // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  int getNumGPUs() const override { return devices; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
} // namespace at

extern "C" void fake_cuda(int index, int count) {
  current = static_cast<DeviceIndex>(index);
  devices = static_cast<DeviceIndex>(count);
}
