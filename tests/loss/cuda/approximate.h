// Mathematics with the errors a device may have, and more: exp2f off by 4 units in the last place, tanhf, log1pf and
// expm1f by 2, denormal results flushed to zero. Included in front of the host twin.
#include <cmath>
#include <cstdint>
#include <cstring>

inline float eaft_off_by(float value, int ulps) {
  if (!(std::fabs(value) < INFINITY) || value == 0) return value;
  if (std::fabs(value) < 1.17549435e-38f) return 0;
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits += ulps;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
// up or down, by what the bits of the argument happen to be; 2^0 = 1 is right everywhere
inline float eaft_exp2f(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return x == 0 ? 1 : eaft_off_by(exp2f(x), bits * 2654435761u >> 31 ? 4 : -4);
}
inline float eaft_log1pf(float x) { return eaft_off_by(log1pf(x), 2); }
inline float eaft_expm1f(float x) { return eaft_off_by(expm1f(x), -2); }
inline float eaft_tanhf(float x) { return std::fabs(x) > 8 ? tanhf(x) : eaft_off_by(tanhf(x), -2); }
#define exp2f eaft_exp2f
#define log1pf eaft_log1pf
#define expm1f eaft_expm1f
#define tanhf eaft_tanhf
