// Progress of one stage: a line that redraws itself on a terminal, plain lines (at most one every
// few seconds, and always the last) where stderr is not a terminal. Only rank 0 makes one.
#pragma once

#include <cstdint>
#include <string>

namespace sala {

struct ProgressState {
  std::string label;
  int64_t done = 0;
  int64_t total = 0;
  std::string text;
  double seconds_left = -1;  // negative: not known yet
};

// One line of at most `width` columns: label, bar, percentage, counts, time left, text. What does
// not fit is left out: first the bar, then the end of the text.
std::string ProgressLine(const ProgressState& state, int width);

// "0:07", "12:34", "3:05:09", "2d 03:05"; "-" when negative.
std::string DurationText(double seconds);

class ProgressDisplay {
 public:
  // label: "stable 3/9"; total steps of the stage.
  ProgressDisplay(std::string label, int64_t total, bool enabled);
  ProgressDisplay(const ProgressDisplay&) = delete;
  ProgressDisplay& operator=(const ProgressDisplay&) = delete;
  ~ProgressDisplay();

  // done of total, with free text such as "loss 3.214  lr 1.2e-3  8,211 tok/s"; the display adds
  // bar, percentage and time left.
  void Update(int64_t done, const std::string& text);
  void Finish();  // leaves the last state on the screen

 private:
  void Draw(double now);

  ProgressState state_;
  bool enabled_;
  bool terminal_ = false;
  bool finished_ = false;
  bool drawn_ = false;  // the last state is on the screen
  int64_t first_ = -1;  // `done` of the first update: a resumed stage does not start at 0
  double start_seconds_ = 0;
  double last_draw_seconds_ = -1;
};

}  // namespace sala
