-- GCRA as a token bucket: what is owed drains at quota per window.
-- Field: "at owed quota" (us, units, units; owed is fractional). What is owed is a share of the quota it was owed under:
-- kept as the two numbers, so that units stay exact while the quota does, and scaled when it has changed.
-- The receipt is when it was charged: what may have drained since is not given back, whatever was refunded meanwhile.
make.g = function()
  local function settle(s)
    if s.owed < s.policy.dust then s.owed = 0 end
    s.free = floor(s.policy.quota + s.policy.edge - s.owed)
  end

  return {
    load = function(s, raw, now)
      s.at, s.owed = now, 0
      if raw then
        local stored, owed, under = parts(raw, '^(%d+) (%S+) (%d+)$')
        local quota = s.policy.quota
        stored, owed, under = tonumber(stored), tonumber(owed), tonumber(under)
        if under ~= quota then owed = owed * quota / under end
        if stored > now then s.owed, s.moved = owed, true
        else s.owed = max(0, owed - (now - stored) * quota / s.policy.window) end
      end
      s.receipt_now = now
      settle(s)
    end,
    wait = function(s, cost, now)
      return ceil((s.owed + cost - s.policy.quota) * s.policy.window / s.policy.quota)
    end,
    charge = function(s, cost)
      s.owed = min(s.owed + cost, 10 * s.policy.quota)
      settle(s)
    end,
    refund = function(s, cost, receipt)
      -- Of before the clock was set back.
      if receipt > s.at then return false end
      local late = s.at - receipt
      local back = min(s.owed, max(0, cost - late * s.policy.quota / s.policy.window))
      -- All drained already, and the key may be gone: nothing to write.
      if back == 0 then return false end
      s.owed = s.owed - back
      settle(s)
      return true
    end,
    reset = function(s, now)
      if s.owed == 0 then return 0 end
      return ceil(s.owed * s.policy.window / s.policy.quota)
    end,
    save = function(s, now)
      return format('%.0f %.17g %d', s.at, s.owed, s.policy.quota),
        max(1, ceil(s.owed * s.policy.window / s.policy.quota))
    end,
  }
end
