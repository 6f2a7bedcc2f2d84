//! The learning rate as a function of the step.

/// Linear warm-up, then half a cosine, by step.
///
/// Burn's own cosine schedule restarts after its last step; this one stays at `min_lr`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// The rate at the end of the warm-up.
    pub lr: f64,
    /// The rate of step 0, if there is a warm-up.
    pub warmup_lr: f64,
    /// The rate that the cosine ends at.
    pub min_lr: f64,
    /// Steps of warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run, warm-up included.
    pub total_steps: u64,
}

impl Schedule {
    /// The rate used by step `step`, counted from zero.
    pub fn lr_at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            let progress = step as f64 / self.warmup_steps as f64;
            return self.warmup_lr + (self.lr - self.warmup_lr) * progress;
        }
        let decay_steps = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = ((step - self.warmup_steps) as f64 / decay_steps as f64).min(1.0);
        let cosine = 0.5 * (1.0 + (std::f64::consts::PI * progress).cos());
        self.min_lr + (self.lr - self.min_lr) * cosine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIFAR: Schedule = Schedule {
        lr: 1e-3,
        warmup_lr: 0.0,
        min_lr: 1e-5,
        warmup_steps: 390,
        total_steps: 3900,
    };

    #[test]
    fn warm_up_is_linear_from_the_first_step() {
        assert_eq!(CIFAR.lr_at(0), 0.0);
        assert!((CIFAR.lr_at(39) - 1e-4).abs() < 1e-15);
        assert!((CIFAR.lr_at(390) - 1e-3).abs() < 1e-15);
    }

    #[test]
    fn cosine_passes_known_points() {
        // Quarter: 1/2 + √2/4; half: 1/2; end and beyond: 0, of the span above min_lr.
        let at = |fraction: f64| CIFAR.lr_at(390 + (3510.0 * fraction) as u64);
        let span = 1e-3 - 1e-5;
        let quarter = 1e-5 + span * (0.5 + 2f64.sqrt() / 4.0);
        assert!((CIFAR.lr_at(390 + 877) - quarter).abs() < 3e-7);
        assert!((at(0.5) - (1e-5 + span / 2.0)).abs() < 1e-12);
        assert!((at(1.0) - 1e-5).abs() < 1e-15);
        assert!((at(3.0) - 1e-5).abs() < 1e-15);
    }

    #[test]
    fn never_rises_after_the_warm_up() {
        for step in 390..4200 {
            assert!(CIFAR.lr_at(step + 1) <= CIFAR.lr_at(step));
        }
    }

    #[test]
    fn degenerate_lengths_stay_finite() {
        let schedule = |warmup_steps, total_steps| Schedule {
            warmup_steps,
            total_steps,
            ..CIFAR
        };
        for (warmup, total) in [(0, 0), (0, 1), (1, 1), (7, 3)] {
            for step in 0..10 {
                let lr = schedule(warmup, total).lr_at(step);
                assert!((0.0..=1e-3).contains(&lr), "{warmup} {total} {step}: {lr}");
            }
        }
    }
}
