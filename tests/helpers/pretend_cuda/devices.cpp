// Registers CUDA devices with a CPU build of PyTorch: their guards, streams and events do nothing.
// No kernel is registered, as tensors on these devices are handled in Python (tensors.py).
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include <cstdlib>
#include <map>
#include <mutex>

namespace {

c10::DeviceIndex num_devices() {
  const char* setting = std::getenv("PRETEND_CUDA_DEVICES");
  return static_cast<c10::DeviceIndex>(setting ? std::atoi(setting) : 1);
}

thread_local c10::DeviceIndex current_index = 0;

// What the device thread of autograd and c10's guards ask of a backend.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device device) const override {
    const auto old = getDevice();
    setDevice(device);
    return old;
  }
  c10::Device getDevice() const override { return {c10::DeviceType::CUDA, current_index}; }
  void setDevice(c10::Device device) const override {
    if (device.index() >= 0) current_index = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current_index = device.index();
  }
  c10::Stream getStream(c10::Device device) const override {
    const auto index = device.index() < 0 ? current_index : device.index();
    return c10::Stream(c10::Stream::DEFAULT, {c10::DeviceType::CUDA, index});
  }
  c10::Stream getNewStream(c10::Device device, int = 0) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    return getStream(stream.device());
  }
  c10::DeviceIndex deviceCount() const noexcept override { return num_devices(); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  void record(void** event, const c10::Stream&, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    *event = reinterpret_cast<void*>(1);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
};

// Page-locked host memory is ordinary memory here, but known: `tensor.is_pinned()` tells the truth,
// and a copy out of other memory can be recognised as one that the host waits for.
class PinnedAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* data = c10::GetCPUAllocator()->raw_allocate(bytes ? bytes : 1);
    const std::lock_guard<std::mutex> lock(mutex_);
    sizes_[data] = bytes;
    return {data, data, &free_pinned, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* target, const void* source, std::size_t bytes) const override {
    default_copy_data(target, source, bytes);
  }
  bool contains(const void* data) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto after = sizes_.upper_bound(const_cast<void*>(data));
    if (after == sizes_.begin()) return false;
    const auto& [start, bytes] = *std::prev(after);
    return static_cast<const char*>(data) < static_cast<const char*>(start) + bytes;
  }
  static PinnedAllocator& get() {
    static auto* allocator = new PinnedAllocator();  // never destroyed: tensors may outlive main
    return *allocator;
  }

 private:
  static void free_pinned(void* data) {
    {
      const std::lock_guard<std::mutex> lock(get().mutex_);
      get().sizes_.erase(data);
    }
    c10::GetCPUAllocator()->raw_deallocate(data);
  }
  std::mutex mutex_;
  std::map<void*, size_t> sizes_;
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return num_devices(); }
  int getNumGPUs() const override { return num_devices(); }
  c10::DeviceIndex current_device() const override { return current_index; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current_index = index; }
  c10::DeviceIndex getCurrentDevice() const override { return current_index; }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const auto old = current_index;
    if (index >= 0) current_index = index;
    return old;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return exchangeDevice(index);
  }
  bool isPinnedPtr(const void* data) const override {
    return PinnedAllocator::get().contains(data);
  }
  at::Allocator* getPinnedMemoryAllocator() const override { return &PinnedAllocator::get(); }
  void deviceSynchronize(c10::DeviceIndex) const override {}
};

// DistributedDataParallel's logger times the passes of a GPU; the host's clock does.
class HostTimer final : public c10d::Timer {
 public:
  explicit HostTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    return getTimeRef(end) - getTimeRef(start);
  }
};

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
namespace at {
C10_REGISTER_TYPED_CLASS(CUDAHooksRegistry, "CUDAHooks", Hooks);
}
namespace c10d {
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer);
}
