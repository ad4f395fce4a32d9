// Progress of one stage: a line that redraws itself on a terminal, plain lines (at most one every few seconds, and always
// the last) where stderr is not a terminal. Only rank 0 makes one.
#pragma once

#include <cstdint>
#include <string>

namespace sala {

class ProgressDisplay {
 public:
  // label: "stable 3/9"; total steps of the stage.
  ProgressDisplay(std::string label, int64_t total, bool enabled);
  ProgressDisplay(const ProgressDisplay&) = delete;
  ProgressDisplay& operator=(const ProgressDisplay&) = delete;
  ~ProgressDisplay();

  // done of total, with free text such as "loss 3.214  lr 1.2e-3  8,211 tok/s"; the display adds bar, percentage and time left.
  void Update(int64_t done, const std::string& text);
  void Finish();  // leaves the last state on the screen

 private:
  std::string label_;
  int64_t total_;
  bool enabled_;
  bool terminal_ = false;
  bool finished_ = false;
  int64_t first_ = -1;
  int64_t last_done_ = 0;
  std::string last_text_;
  double start_seconds_ = 0;
  double last_draw_seconds_ = -1;
};

}  // namespace sala
