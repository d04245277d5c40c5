// What a device of PyTorch needs in C++ so that the rest can be Python: a guard (which autograd asks for the current card,
// its streams and events), and tensors over given memory. Built for one device type, KIND; there are two cards.
#include <ATen/detail/HPUHooksInterface.h>
#include <ATen/detail/XPUHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include <cstdlib>

#define JOIN_(a, b, c) a##b##c
#define JOIN(a, b, c) JOIN_(a, b, c)

namespace {

constexpr auto kKind = c10::DeviceType::KIND;
thread_local c10::DeviceIndex current = 0;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kKind; }
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  c10::Device getDevice() const override { return {kKind, current}; }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current = device.has_index() ? device.index() : 0;
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    auto before = getDevice();
    setDevice(device);
    return before;
  }
  // work is done when it is queued: one stream a card, events that are always over
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, device);
  }
  c10::Stream getDefaultStream(c10::Device device) const override { return getStream(device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return getStream(stream.device()); }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

at::Tensor make(
    const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, at::ScalarType dtype, int64_t index,
    int64_t bytes) {
  c10::Device device(kKind, static_cast<c10::DeviceIndex>(index));
  void* memory = std::malloc(bytes + 64);
  return at::for_blob(memory, sizes)
      .strides(strides)
      .deleter([](void* address) { std::free(address); })
      .options(at::TensorOptions().dtype(dtype).device(device))
      .target_device(device)
      .make_tensor();
}

int64_t card() { return current; }
void set_card(int64_t index) { current = static_cast<c10::DeviceIndex>(index); }

}  // namespace

// PyTorch looks for this class by its name; it makes the device the process's accelerator
struct JOIN(, KIND, Hooks) final : at::JOIN(, KIND, HooksInterface) {
  template <class... Args>
  explicit JOIN(, KIND, Hooks)(Args&&...) {}
  void init() const override {}
  bool JOIN(has, KIND, )() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 2; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(c10::DeviceIndex index) const override { current = index; }
};

C10_REGISTER_GUARD_IMPL(KIND, Guard);
namespace at {
using JOIN(, KIND, Hooks) = ::JOIN(, KIND, Hooks);
JOIN(REGISTER_, KIND, _HOOKS)(JOIN(, KIND, Hooks))
}  // namespace at

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("make", [](std::vector<int64_t> sizes, std::vector<int64_t> strides, py::object dtype, int64_t index,
                        int64_t bytes) {
    return make(sizes, strides, torch::python::detail::py_object_to_dtype(dtype), index, bytes);
  });
  module.def("card", &card);
  module.def("set_card", &set_card);
}
